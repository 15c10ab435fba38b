"""From the port to a request: connections within a cap, each with deadlines, their bytes read strictly."""
