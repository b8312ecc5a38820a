#include "lookup.h"
namespace relssl {
template <>
void lookup_sm90<RELSSL_DIM>(const Lookup&, bool, bool, int, const Where&) {}
}
