"""Who runs next, in which blocks and slots: plain Python on plain numbers, without PyTorch."""
