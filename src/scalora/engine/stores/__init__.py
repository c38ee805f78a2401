"""Where moved differences go."""

from .adapter import AdapterStore
from .base_weights import BaseStore
from .store import Store

__all__ = ["AdapterStore", "BaseStore", "Store"]
