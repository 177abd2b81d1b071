"""The measuring room of chapter 9: every component beside its reference form and beside other libraries.

`timing` takes the time, `rows` checks outputs before it does, `formulas` counts operations and bytes, `ceilings`
measures what the machine can do; a module for each suite says what is compared. `python -m minigated bench`.
"""
