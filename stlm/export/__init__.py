"""Models in the forms that others read: every conversion is proven on the logits of a text."""

from stlm.export.artifact import Packed, convert_to_artifact
from stlm.export.conversion import Converted, convert_from, convert_to

__all__ = ["Converted", "Packed", "convert_from", "convert_to", "convert_to_artifact"]
