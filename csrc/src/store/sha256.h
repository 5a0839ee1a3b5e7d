// SHA-256 (FIPS 180-4) of a file, for the manifest's checksums.
#pragma once

#include <string>

namespace paretofuse {

// The checksum of an open file's content, hexadecimal; empty if it cannot be read.
std::string sha256_of(int descriptor);

}  // namespace paretofuse
