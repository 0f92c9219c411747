"""Configs: base.py holds every knob with its comment; the other files say what differs."""
