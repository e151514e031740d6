#include "strategy.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>
#include <vector>

namespace cbam::cuda {
namespace {

struct Named {
  const char* name;
  Strategy strategy;
};
constexpr std::array<Named, 5> kNamed = {
    {{"auto", {Strategy::kAuto}},
     {"streaming", {Strategy::kStreaming}},
     {"resident", {Strategy::kResident}},
     {"resident-channels", {Strategy::kResident, {Split::kChannels}}},
     {"resident-pixels", {Strategy::kResident, {Split::kPixels}}}}};

std::vector<std::string> pieces_of(const std::string& text) {
  std::vector<std::string> pieces;
  std::istringstream stream(text);
  for (std::string piece; std::getline(stream, piece, ':');) pieces.push_back(piece);
  if (!text.empty() && text.back() == ':') pieces.emplace_back();
  return pieces;
}

std::invalid_argument unknown(const std::string& name) {
  return std::invalid_argument(
      "strategy: expected auto, streaming or resident, which -channels or -pixels and :cluster or "
      ":grid may follow, with numbers like :16:1:8 (blocks of a team; 1 or 2 blocks on a "
      "multiprocessor; 1, 2, 4 or 8 samples of a visit; 0 for any) and :ahead, got " +
      name);
}

// -1 for what is none of at most four digits.
int number_of(const std::string& piece) {
  const bool is_one = !piece.empty() && piece.size() <= 4 &&
                      piece.find_first_not_of("0123456789") == std::string::npos;
  return is_one ? std::stoi(piece) : -1;
}

}  // namespace

Strategy strategy_of(const std::string& name) {
  auto pieces = pieces_of(name);
  const std::string& first = pieces.empty() ? name : pieces[0];
  const auto* named = std::find_if(kNamed.begin(), kNamed.end(),
                                   [&](const Named& known) { return first == known.name; });
  if (named == kNamed.end()) throw unknown(name);
  Strategy strategy = named->strategy;
  if (pieces.size() == 1) return strategy;
  const bool grid = pieces[1] == "grid";
  if (strategy.kind != Strategy::kResident || (!grid && pieces[1] != "cluster"))
    throw unknown(name);
  strategy.way.cluster = !grid;
  strategy.way.ahead = pieces.back() == "ahead";
  if (strategy.way.ahead) pieces.pop_back();
  const std::array<int*, 3> numbers = {&strategy.way.team, &strategy.way.blocks,
                                       &strategy.way.samples};
  if (pieces.size() > 2 + numbers.size()) throw unknown(name);
  for (size_t i = 2; i < pieces.size(); ++i) {
    *numbers[i - 2] = number_of(pieces[i]);
    if (*numbers[i - 2] < 0) throw unknown(name);
  }
  const int samples = strategy.way.samples;
  if (strategy.way.blocks > 2 || samples > kMostVisited || (samples & (samples - 1)) != 0)
    throw unknown(name);
  return strategy;
}

Strategy strategy_asked_for() {
  const char* name = std::getenv("CBAM_CUDA_STRATEGY");
  return name && *name ? strategy_of(name) : Strategy{};
}

std::invalid_argument not_possible(const char* reason) {
  return std::invalid_argument(
      std::string("strategy: expected one that is possible, got resident: ") + reason);
}

}  // namespace cbam::cuda
