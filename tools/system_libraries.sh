#!/bin/sh
# The shared libraries that open3d and OpenCV load on Linux: installed where that is possible, otherwise the one line that does it is printed.
wanted="libgl1 libegl1 libglib2.0-0 libusb-1.0-0 libgomp1"
[ "$(uname -s)" = Linux ] && command -v dpkg >/dev/null 2>&1 || exit 0
missing=""
for package in $wanted; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >/dev/null 2>&1 && exit 0
fi
echo "system libraries are missing; run: sudo apt-get install -y$missing" >&2
exit 0
