"""The quickstart's library: composes labelled scenes, trains twins on them, and draws what they find."""

TWINS = ("uniform", "adaptive")  # models that differ in their thresholds alone, trained alike


def check_shown(name: str, shown: tuple[int, ...], scenes: int) -> None:
    """Raise ValueError unless the numbers of the scenes that a plan shows are those of scenes that it makes."""
    if any(number >= scenes for number in shown):
        raise ValueError(f"{name}={shown} must be below the number of test scenes, {scenes}")
