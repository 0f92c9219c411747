"""Launchers: how the runs of a config file's sweep are started somewhere."""
