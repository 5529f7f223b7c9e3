"""Sites: every convolution and linear call of a captured model, as frozen data.

A site is one call; a layer is the weight behind one or more of them. What multiplies by weights and
is no site is listed with the reason.
"""

from aim_surgery.sites.calls import Call, find_calls
from aim_surgery.sites.find import find_sites
from aim_surgery.sites.site import Kind, Site, Skip

__all__ = ["Call", "Kind", "Site", "Skip", "find_calls", "find_sites"]
