"""What every route needs: who may call, bounds of bodies, errors as replies, work off the event loop."""
