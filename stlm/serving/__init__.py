"""A model behind the OpenAI protocol: requests of many clients are decoded together."""

from stlm.serving.app import build_app
from stlm.serving.chat import ChatTemplate
from stlm.serving.protocol import Limits
from stlm.serving.scheduler import Scheduler

__all__ = ["ChatTemplate", "Limits", "Scheduler", "build_app"]
