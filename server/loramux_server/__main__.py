"""`python -m loramux_server` is the `loramux` command."""

from loramux_server.cli.main import main

raise SystemExit(main())
