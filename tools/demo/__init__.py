"""The quickstart's library: composes labelled scenes, trains twins on them, and draws what they find."""

TWINS = ("uniform", "adaptive")  # models that differ in their thresholds alone, trained alike
