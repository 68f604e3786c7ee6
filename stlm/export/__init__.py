"""Models in the forms that others read: every conversion is proven on the logits of a text."""

from stlm.export.conversion import Converted, convert_from, convert_to

__all__ = ["Converted", "convert_from", "convert_to"]
