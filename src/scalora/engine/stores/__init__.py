"""Where moved differences go."""

from .adapter import AdapterStore
from .base_weights import BaseStore
from .store import Move, Store, whole_update, whole_updates

__all__ = ["AdapterStore", "BaseStore", "Move", "Store", "whole_update", "whole_updates"]
