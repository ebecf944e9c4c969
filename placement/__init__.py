"""Pure planning of expert placement: traces, topology, objective, optimizer, migration plans, reports."""

from placement.replica_choice import choose_replicas
from placement.tables import Placement, live_slots

__all__ = ["Placement", "choose_replicas", "live_slots"]
