"""The package `deep_ep`, provided by tokenferry; its submodules are in the folder of `tokenferry deep-ep-path`."""

import os

from tokenferry.compat import deep_ep_path
from tokenferry.compat.deep_ep import (
    Buffer,
    Config,
    ElasticBuffer,
    EPBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
    HybridEPBuffer,
    __version__,
    get_logical_domain_size,
    get_physical_domain_size,
    topk_idx_t,
)

__all__ = [
    "Buffer",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
__path__ = [os.path.join(deep_ep_path.folder(), "deep_ep")]

_folder = os.path.dirname(os.path.abspath(__file__))
_foreign = sorted(set(os.listdir(_folder)) - {"__init__.py", "__pycache__"})
if _foreign:
    raise ImportError(
        f"deep_ep: {', '.join(_foreign)} in {_folder} are not tokenferry's: another distribution was installed over "
        "tokenferry-deep-ep, or the other way round; uninstall both, then install one"
    )

# Behind the check, since files of another distribution may have these names.
from deep_ep import buffer as buffer  # noqa: E402
from deep_ep import buffers as buffers  # noqa: E402
from deep_ep import hybrid_ep_buffer as hybrid_ep_buffer  # noqa: E402
from deep_ep import utils as utils  # noqa: E402
