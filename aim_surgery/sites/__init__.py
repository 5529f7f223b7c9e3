"""Sites: every convolution and linear call of a captured model, and the stages that they form.

A site is one call; a layer is the weight behind one or more of them. What multiplies by weights and
is no site is listed with the reason. A boundary is a place between sites where a write may follow.
"""

from aim_surgery.sites.boundary import Boundary, boundary_nodes
from aim_surgery.sites.calls import Call, find_calls
from aim_surgery.sites.find import find_sites, graph_sites, python_calls
from aim_surgery.sites.inside import fault_inside
from aim_surgery.sites.leaks import may_leak_unseen, why_not_pooled
from aim_surgery.sites.match import match_boundaries
from aim_surgery.sites.site import Kind, Site, Skip
from aim_surgery.sites.stages import Stages, find_stages

__all__ = [
    "Boundary",
    "Call",
    "Kind",
    "Site",
    "Skip",
    "Stages",
    "boundary_nodes",
    "fault_inside",
    "find_calls",
    "find_sites",
    "find_stages",
    "graph_sites",
    "match_boundaries",
    "may_leak_unseen",
    "python_calls",
    "why_not_pooled",
]
