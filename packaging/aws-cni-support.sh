#!/bin/sh
# Collects what is needed to understand the network of this node, as root, into /var/log/eks_<instance>_<time>_<version>.tar.gz
# (.tar where there is no gzip). The installer puts it beside the plugin, whose executable does the work: it is called
# through a link, because its name decides what it is.
#
# aws-cni-support.sh [--ignore_introspection] [--ignore_metrics] [option of "enibox support-bundle"]...
set -eu

for option; do
  shift
  case $option in
    --ignore_introspection) option=--no-introspection ;;
    --ignore_metrics) option=--no-metrics ;;
  esac
  set -- "$@" "$option"
done

umask 077
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
trap 'exit 1' HUP INT TERM
ln -s "$(cd "$(dirname "$0")" && pwd)/aws-cni" "$link/enibox"

# The first one is that of Nitro instances.
for file in /sys/devices/virtual/dmi/id/board_asset_tag /var/lib/cloud/data/instance-id /etc/hostname; do
  instance=$(tr -cd 'A-Za-z0-9.-' 2> /dev/null < "$file") || instance=
  [ -z "$instance" ] || break
done
version=$("$link/enibox" version)
bundle=${ENIBOX_SUPPORT_FOLDER:-/var/log}/eks_${instance:-node}_$(date -u +%Y-%m-%d_%H%M-%Z)_${version#enibox }.tar
"$link/enibox" support-bundle --output "$bundle" "$@"
if command -v gzip > /dev/null && gzip "$bundle"; then
  bundle=$bundle.gz
fi
echo "$bundle"
