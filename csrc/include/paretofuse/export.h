// Which symbols the shared library shows; everything else in it is hidden.
#pragma once

#if defined(PARETOFUSE_SHARED)  // building the libraries, or using the shared one
#define PARETOFUSE_API __attribute__((visibility("default")))
#else
#define PARETOFUSE_API
#endif
