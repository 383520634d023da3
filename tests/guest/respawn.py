"""Run inside a sandbox: a chain of processes that each start the next and end, so that a killer always comes
late.
"""

import os
import time

while True:
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.002)
        continue
    os._exit(0)
