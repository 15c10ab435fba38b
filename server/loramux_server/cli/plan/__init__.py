"""`loramux plan`: what a training, or a server on a card, will take."""
