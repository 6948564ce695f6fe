"""Numbers with what they count, in words."""


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`, `4,096 positions`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
