#!/usr/bin/env bash
# Fetch freely licensed music in three styles from the packages of a Debian-like system. See --help.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repo/.venv/bin/python}

usage() {
    cat <<'TEXT'
usage: fetch_free_music.sh DIR [--styles LIST] [--max-tracks N] [--keep-debs]

Brings up to 65 tracks (about 4 hours, 270 MB) of freely licensed music into DIR/<style>/, from Debian's packages.
The packages are downloaded and unpacked, nothing is installed, and root isn't needed. Beside each track lie
<track>.tags.txt (descriptors) and <track>.license.txt (author, licence, origin). Run it again to resume: packages
and tracks that are there already aren't fetched twice.

  --styles LIST     comma-separated, of electronic, metal, orchestral (default: all three)
  --max-tracks N    at most N tracks a style (default: all of 20 s or more)
  --keep-debs       leave the downloaded packages in DIR/.debs
  -h, --help        show this text

  PYTHON            environment variable: the Python to use (default: .venv/bin/python, which `make setup` creates)
TEXT
}

die() { # die STATUS SENTENCE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

# The packages that hold a style: the first one this system's package lists know is taken.
packages_of() {
    case $1 in
        electronic) echo singularity-music ;;
        metal) echo marsshooter-data ;;
        orchestral) echo wesnoth-1.16-music wesnoth-1.18-music ;;
        *) return 1 ;;
    esac
}

dir='' styles=electronic,metal,orchestral max_tracks='' keep_debs=''
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --styles | --max-tracks)
            [[ $# -ge 2 ]] || die 2 "$1 needs a value; see --help"
            if [[ $1 == --styles ]]; then styles=$2; else max_tracks=$2; fi
            shift
            ;;
        --keep-debs) keep_debs=1 ;;
        -*) die 2 "unknown option $1; see --help" ;;
        *)
            [[ -z $dir ]] || die 2 "one DIR is enough, but there is also '$1'; see --help"
            dir=$1
            ;;
    esac
    shift
done
[[ -n $dir ]] || die 2 "name the directory to fetch into; see --help"
[[ -z $max_tracks || $max_tracks =~ ^[1-9][0-9]*$ ]] || die 2 "--max-tracks must be a whole number above 0, not '$max_tracks'"
IFS=, read -r -a style_list <<<"$styles"
((${#style_list[@]})) || die 2 "--styles is empty; choose of electronic, metal, orchestral"
for style in "${style_list[@]}"; do
    packages_of "$style" >/dev/null || die 2 "unknown style '$style'; choose of electronic, metal, orchestral"
done

for tool in apt-get apt-cache dpkg-deb; do
    command -v "$tool" >/dev/null || die 1 "this script needs a Debian-like system, and there is no $tool here"
done
"$python" -c 'import acestep_pipeline, soundfile' 2>/dev/null ||
    die 1 "$python can't import acestep_pipeline and soundfile; run 'make setup' first, or set PYTHON"
mkdir -p "$dir" 2>/dev/null && [[ -w $dir ]] || die 2 "can't write to $dir; choose another directory"
dir=$(cd "$dir" && pwd)
debs=$dir/.debs
log=$debs/apt.log
limit=(${max_tracks:+--max_tracks "$max_tracks"})
describe() { "$python" "$repo/examples/describe_free_music.py" "$@"; }

# Sets `deb` to the package file of a style, downloading it unless a complete one is there.
find_or_download_deb() {
    local style=$1 candidates package partial=$debs/partial
    read -r -a candidates <<<"$(packages_of "$style")"
    for package in "${candidates[@]}"; do
        for deb in "$debs/$package"_*.deb; do # only a finished download ever gets this name
            [[ -f $deb ]] && return
        done
    done
    for package in "${candidates[@]}" ''; do
        apt-cache show --no-all-versions "$package" >"$log" 2>&1 && break
    done
    [[ -n $package ]] ||
        die 1 "the package lists don't know ${candidates[0]}; run 'apt-get update' as root, then run this again"
    printf '%s: downloading %s (%d MB) …\n' "$style" "$package" $(($(awk '/^Size:/ {print $2; exit}' "$log") / 1000000))
    rm -rf "$partial" # an interrupted download may be of an older version
    mkdir "$partial"
    if ! (cd "$partial" && apt-get download -o APT::Sandbox::User="$(id -un)" "$package") >"$log" 2>&1; then
        if grep -q ' 404 ' "$log"; then
            die 1 "$package has moved on since the package lists were fetched; run 'apt-get update' as root, then run this again"
        fi
        die 1 "couldn't download $package: check the network and free space (details in $log), then run this again to go on"
    fi
    mv "$partial/$package"_*.deb "$debs/"
    deb=$(find "$debs" -maxdepth 1 -name "${package}_*.deb")
}

unpacked=''
trap '[[ -z $unpacked ]] || rm -rf "$unpacked"' EXIT
used_debs=()
for style in "${style_list[@]}"; do
    if describe check "$dir/$style" "${limit[@]}"; then
        printf '%s: already complete\n' "$style"
        continue
    fi
    mkdir -p "$debs"
    find_or_download_deb "$style"
    used_debs+=("$deb")
    unpacked=$(mktemp -d "$debs/unpacked.XXXXXX")
    dpkg-deb -x "$deb" "$unpacked" 2>"$log" || die 1 "couldn't unpack $deb (details in $log); free some space or delete that file, then run this again"
    describe add "$unpacked" "$dir/$style" --style "$style" --package "$(dpkg-deb -f "$deb" Package)" \
        --version "$(dpkg-deb -f "$deb" Version)" "${limit[@]}"
    rm -rf "$unpacked"
done
if [[ -z $keep_debs && -d $debs ]]; then
    rm -f "${used_debs[@]}" "$log"
    rmdir "$debs/partial" "$debs" 2>/dev/null || true # something else is in there: leave it
fi

echo
describe summary "${style_list[@]/#/$dir/}"
printf '\nTrain on it with:\n  make train DATA=%q\n' "$dir"
