"""Why each part of a RepBNN is as it is, as values: `explain.Explainer`; in words: `explain_words`."""

from repbnn_cli.explain.explainer import Explainer, Group, Neighbour, Story, TensorStory, Whole

__all__ = [
    "Explainer",
    "Group",
    "Neighbour",
    "Story",
    "TensorStory",
    "Whole",
]
