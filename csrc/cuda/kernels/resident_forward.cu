// The resident forward whose blocks hold channels.
#include "resident_forward.cuh"

namespace cbam::cuda {

template void resident_forward<Split::kChannels>(DType, bool, const ResidentForward&, const Grid&,
                                                 Stream);
template const char* why_no_resident_forward<Split::kChannels>(DType, bool, bool, const Grid&);

}  // namespace cbam::cuda
