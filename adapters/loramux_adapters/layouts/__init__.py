"""Adapters as other tools write them, one file each -> the PEFT directory that computes the same."""
