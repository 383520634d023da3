#!/bin/sh
# The last step of every image but the guest's copy: give it the places that a sandbox's container expects.
# Also run on an operator's own image, of any distribution, so it asks for nothing but sh, find and coreutils.
set -eu

# No file raises its caller: the container forbids it (no-new-privileges), and the image holds none either.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +

# The three places of the sandbox's disk, the two folder mounts, and nothing else may be written (read-only root).
mkdir -p /workspace /home/agent /tmp /run/e2a/guest /run/e2a/host
rm -rf /var/tmp
ln -s /tmp /var/tmp

# Each slot has a uid of its own, so who `agent` is comes with the container, by the read-only host folder.
rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow-
ln -sf /run/e2a/host/passwd /etc/passwd
ln -sf /run/e2a/host/group /etc/group
