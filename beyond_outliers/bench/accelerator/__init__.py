"""The check of an accelerator: does it compute correctly, and how close does it get to its peak?"""
