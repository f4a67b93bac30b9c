"""How many images the tests' folder has of each colour, and how its rows are named."""

TRAIN, TEST = 12, 7
"""Images of each colour."""


def names(rows):
    return [(row["label"], row["image"].name) for row in rows]
