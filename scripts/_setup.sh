# Sourced by the other scripts: make a Python environment, install the project, and put its commands on PATH.
#
#     ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
#     source "$ROOT/scripts/_setup.sh"
#     stlm_setup [EXTRA...]         # extras of setup.py, such as dev; none: what training needs
#
# The environment is .venv in the project root, or the one named by STLM_VENV; STLM_PYTHON names the Python for it.
# pip's own settings and environment variables (a mirror, another index for torch) apply. No compiler is
# needed: stlm.training.deepspeed.startup starts DeepSpeed without the operators that it would build.
#
# The file stlm-setup in the environment records what is installed, so that the next call does nothing. After a killed
# call, the next one starts from an empty environment. Two calls at once wait for each other.

stlm_setup() {
    local extras=$*
    VENV=${STLM_VENV:-$ROOT/.venv}
    { mkdir -p "$VENV" && [ -w "$VENV" ]; } 2>/dev/null || _die "cannot write to $VENV; choose another place with STLM_VENV"
    VENV=$(cd "$VENV" && pwd -P)
    # A change in any of the three requires another installation.
    WANTED=$(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum | tr ' ' -)

    if ! _is_ready; then
        # This shell and its children hold the lock, so that a pip that outlives a killed script is waited for.
        command -v flock >/dev/null || _die "no flock command; $(_how_to_install util-linux util-linux)"
        exec 9>>"$VENV/stlm-setup.lock"
        flock --nonblock 9 || { _say "waiting for another set-up of $VENV"; flock 9; }
        _is_ready || { _make_environment; _is_ready || _install; }
        exec 9>&-
    fi
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
}

_say() { echo "set-up: $*" >&2; }

_die() { echo "error: set-up: $*" >&2; exit 2; }

# _how_to_install DEBIAN_PACKAGE FEDORA_PACKAGE: print how to install it on this system.
_how_to_install() {
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo "
    if command -v apt-get >/dev/null; then echo "install it: ${sudo}apt-get install $1"
    elif command -v dnf >/dev/null; then echo "install it: ${sudo}dnf install $2"
    else echo "install it with this system's package manager (Debian calls it $1, Fedora $2)"; fi
}

# --- the note --------------------------------------------------------------------------------------------------------

# made: yes if this script made the environment.  path: where it was made.  root: the checkout that `import stlm` finds.
# installed: WANTED at the installation; empty while pip works.  extras: the installed ones.
_read_note() {
    NOTE_made="" NOTE_path="" NOTE_root="" NOTE_installed="" NOTE_extras=""
    local key value
    [ -f "$VENV/stlm-setup" ] || return 0
    while IFS='=' read -r key value; do
        case $key in made|path|root|installed|extras) printf -v "NOTE_$key" %s "$value" ;; esac
    done < "$VENV/stlm-setup"
}

_write_note() {
    printf '%s\n' "made=$NOTE_made" "path=$NOTE_path" "root=$NOTE_root" "installed=$NOTE_installed" \
        "extras=$NOTE_extras" > "$VENV/stlm-setup.part"
    mv "$VENV/stlm-setup.part" "$VENV/stlm-setup"
}

# --- the state -------------------------------------------------------------------------------------------------------

_is_ready() {
    local extra
    _read_note
    # An environment contains its absolute path in many files, so a moved or copied one does not work. Several checkouts
    # may share one by STLM_VENV: `import stlm` finds the first of them, which must still exist; the scripts of each
    # checkout import their own code.
    [ -x "$VENV/bin/python" ] && [ "$NOTE_installed" = "$WANTED" ] && [ "$NOTE_path" = "$VENV" ] \
        && [ -f "$NOTE_root/setup.py" ] || return 1
    for extra in $extras; do
        case " $NOTE_extras " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

# --- a Python environment --------------------------------------------------------------------------------------------

_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

_find_python() {
    local python version names=(python3 python3.11 python3.12 python3.13 python3.10 python3.14 python)
    [ -z "${STLM_PYTHON:-}" ] || names=("$STLM_PYTHON")
    for python in "${names[@]}"; do
        if _is_new_enough "$python"; then
            PYTHON=$python
            "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null && return
            version=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
            _die "$PYTHON cannot make environments (no venv or ensurepip); $(_how_to_install "$version-venv" python3)"
        fi
    done
    if [ -n "${STLM_PYTHON:-}" ]; then _die "STLM_PYTHON=$STLM_PYTHON is not Python 3.10 or later"; fi
    _die "no Python 3.10 or later on PATH; $(_how_to_install "python3 python3-venv" python3)" \
        "or name one with STLM_PYTHON"
}

_make_environment() {
    if [ "$NOTE_made" != yes ] && _is_new_enough "$VENV/bin/python"; then
        _say "using the environment $VENV"
        return
    fi
    if [ "$NOTE_made" = yes ] && [ -n "$NOTE_installed" ] && [ "$NOTE_path" = "$VENV" ] \
        && _is_new_enough "$VENV/bin/python"; then
        return
    fi
    # Remove only what this script made.
    if [ "$NOTE_made" != yes ] && [ -n "$(ls -A "$VENV" | grep -v '^stlm-setup')" ]; then
        _die "$VENV holds no working Python 3.10 or later: remove it, or choose another place with STLM_VENV"
    fi
    _find_python
    _say "making the environment $VENV with $("$PYTHON" --version)"
    NOTE_made=yes NOTE_path=$VENV NOTE_root="" NOTE_installed="" NOTE_extras=""
    _write_note
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name 'stlm-setup*' -exec rm -rf {} +
    "$PYTHON" -m venv "$VENV" || _die "$PYTHON -m venv $VENV failed"
}

# --- what goes into it -----------------------------------------------------------------------------------------------

_install() {
    local installed=$NOTE_installed had=$NOTE_extras extra what="$ROOT" quiet=-qq
    for extra in $extras; do
        case " $NOTE_extras " in *" $extra "*) ;; *) NOTE_extras="${NOTE_extras:+$NOTE_extras }$extra" ;; esac
    done
    [ -z "$NOTE_extras" ] || what="$ROOT[${NOTE_extras// /,}]"
    [ ! -t 2 ] || quiet=""   # pip's progress on a terminal, only errors in a log

    _say "installing stlm and its requirements into $VENV (takes minutes the first time)"
    NOTE_made=${NOTE_made:-no} NOTE_path=$VENV NOTE_installed=""
    _write_note
    # shellcheck disable=SC2086
    if ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install $quiet --no-input \
        --editable "$what" --constraint "$ROOT/constraints.txt" >&2; then
        NOTE_installed=$installed NOTE_extras=$had   # pip has changed nothing: the earlier installation still works
        _write_note
        _die "pip failed (its message is above); fix the problem and rerun the command"
    fi
    NOTE_root=$ROOT NOTE_installed=$WANTED
    _write_note
}
