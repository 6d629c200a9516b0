#!/bin/sh
# stand_in.sh WHEEL FOLDER: makes FOLDER/tensorrt from a wheel of TensorRT's Python bindings.
#
# The libraries that the bindings are linked against are replaced by stand-ins, so that the real classes, enums and
# argument checks run with no TensorRT, CUDA or GPU. Each factory of a stand-in gives an object whose every method does
# nothing and gives that object again: a pointer is not null, a bool is true, a number is nonsense. So calls get as far
# as arguments go, and a structure that is given by value (Dims) is not to be looked into.
# Needs python3, g++, readelf and nm. Neither wheels nor what is made of them may be published: NVIDIA's licence.
set -eu
wheel=$1 folder=$2
for tool in g++ readelf nm; do
    command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
python3 -m zipfile -e "$wheel" "$work/wheel"
rm -rf "$folder/tensorrt"
mv "$work/wheel/tensorrt_bindings" "$folder/tensorrt" 2>/dev/null || mv "$work/wheel/tensorrt" "$folder/tensorrt"
bindings=$folder/tensorrt/tensorrt.so
{
    cat <<'CODE'
#include <sys/mman.h>
#include <cstring>
struct Anything;
// A low address: as a size or a count it is a number that can be worked with, and its lowest byte says true.
static Anything* const one = reinterpret_cast<Anything*>(0x20008);
struct Anything {
#define METHOD(name) virtual void* name() { return one; }
#define TEN(name) METHOD(name##0) METHOD(name##1) METHOD(name##2) METHOD(name##3) METHOD(name##4) METHOD(name##5) \
    METHOD(name##6) METHOD(name##7) METHOD(name##8) METHOD(name##9)
#define HUNDRED(name) TEN(name##0) TEN(name##1) TEN(name##2) TEN(name##3) TEN(name##4) TEN(name##5) TEN(name##6) \
    TEN(name##7) TEN(name##8) TEN(name##9)
    HUNDRED(a) HUNDRED(b)
    Anything* implementation = one;  // where NVIDIA's classes keep theirs
};
static struct Start {
    Start() {
        void* page = mmap((void*)0x20000, 1 << 20, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        Anything anything;
        if (page == (void*)0x20000) memcpy((void*)one, (void*)&anything, sizeof anything);  // else another library did
    }
} start;
CODE
    nm -D --undefined-only "$bindings" | awk '$1 == "U" && $2 !~ /@/ && $2 !~ /^_?Py/ {print $2}' | while read -r name; do
        echo "extern \"C\" void* $name() { return one; }"
    done
} >"$work/stand_in.cpp"
readelf -d "$bindings" | sed -n 's/.*(NEEDED).*\[\(libnv[^]]*\)\]/\1/p' | while read -r library; do
    g++ -w -shared -fPIC -Os -o "$folder/tensorrt/$library" -Wl,-soname,"$library" "$work/stand_in.cpp"
done
