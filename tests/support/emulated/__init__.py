"""A graphics processor for tests: CPU tensors, work that is done late, graphs of addresses, memory that runs out."""

from support.emulated.device import EmulatedDevice as EmulatedDevice
from support.emulated.memory import FreedMemory as FreedMemory
