"""The ways of dispatch by the names that run files call them."""

from parallel.dispatch.allgather import AllGatherDispatcher
from parallel.dispatch.alltoall import AllToAllDispatcher
from parallel.dispatch.flex import FlexDispatcher

DISPATCHERS = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher, "flex": FlexDispatcher}
"""``parallel.dispatcher`` -> its class."""
