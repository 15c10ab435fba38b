"""What differs between a CPU and a graphics processor, behind one narrow object: `Device` in device.py."""
