"""An adapter's repository on a model hub -> its files on this machine, fetched by a process of their own."""
