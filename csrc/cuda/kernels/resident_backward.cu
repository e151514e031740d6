// The resident backward whose blocks hold channels.
#include "resident_backward.cuh"

namespace cbam::cuda {

template void resident_backward<Split::kChannels>(DType, bool, const ResidentBackward&, const Grid&,
                                                  Stream);
template const char* why_no_resident_backward<Split::kChannels>(DType, bool,
                                                                const ResidentBackwardGeometry&,
                                                                const Grid&);

}  // namespace cbam::cuda
