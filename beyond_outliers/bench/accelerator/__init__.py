"""The check of an accelerator: is it right there, and how near is it to what the chip can do?"""
