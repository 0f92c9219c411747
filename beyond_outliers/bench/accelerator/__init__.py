"""The check of an accelerator: does it compute correctly, and how near does it come to its peak?"""
