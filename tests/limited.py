"""`limited.py BYTES SCRIPT FLAGS…`: a script that may map that much memory."""

import resource
import sys

from workspace import become

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    become(sys.argv[2:])
