"""The name `deep_ep`, spoken by tokenferry; its submodules lie in the folder that `tokenferry deep-ep-path` prints."""

import os

from tokenferry.compat import deep_ep_path
from tokenferry.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap, __version__, topk_idx_t

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
__path__ = [os.path.join(deep_ep_path.folder(), "deep_ep")]

_folder = os.path.dirname(os.path.abspath(__file__))
_strangers = sorted(set(os.listdir(_folder)) - {"__init__.py", "__pycache__"})
if _strangers:
    raise ImportError(
        f"deep_ep: {', '.join(_strangers)} in {_folder} are not tokenferry's: another distribution was installed over "
        "tokenferry-deep-ep, or the other way round; uninstall both, then install one"
    )
