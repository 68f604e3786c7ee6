"""Server for the OpenAI protocol; requests of many clients are decoded together."""

from stlm.serving.access import Access, checked_origins
from stlm.serving.app import build_app
from stlm.serving.protocol import ServerLimits
from stlm.serving.scheduler import Scheduler
from stlm.serving.server import Server, is_loopback, listen_on, url_of

__all__ = [
    "Access",
    "ServerLimits",
    "Scheduler",
    "Server",
    "build_app",
    "checked_origins",
    "is_loopback",
    "listen_on",
    "url_of",
]
