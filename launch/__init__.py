"""Launchers of a config file's sweep."""
