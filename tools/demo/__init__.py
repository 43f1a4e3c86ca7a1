"""The quickstart's library: composes labelled scenes, trains twins on them, and draws what they find."""
