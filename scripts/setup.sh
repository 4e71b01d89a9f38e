# Sourced by scripts/serve and scripts/test: makes .venv with the package and, where EXTRAS names
# some, its extras; again only when pyproject.toml or the wish has changed.

python=""
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed (set PYTHON to its path)." >&2
    exit 1
fi

extras="${EXTRAS:-}"
wanted="$(cksum < pyproject.toml) $(pwd) $extras"
stamp=.venv/wsgateway.stamp
case "$(cat "$stamp" 2> /dev/null || true)" in
"$wanted"*) ;; # with these extras, or, where none are wished for, with any
*)
    echo "Setting up .venv ..." >&2
    "$python" -m venv .venv || {
        echo "Python's venv module is missing (on Debian: apt install python3-venv)." >&2
        exit 1
    }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" >&2
    echo "$wanted" > "$stamp"
    ;;
esac
