"""Run inside a sandbox: a child that leaves its parent, its session and its group, and stays. Usage: escape
MARKER [trap]
"""

import os
import signal
import sys
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        if "trap" in sys.argv:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "quiet" in sys.argv:
            for fd in (0, 1, 2):
                os.close(fd)
        time.sleep(300)
    os._exit(0)
os.wait()
if "stay" in sys.argv:
    time.sleep(300)
