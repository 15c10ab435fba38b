"""What every route needs: its dependencies, who may call, bounded bodies, errors as replies, worker threads."""
