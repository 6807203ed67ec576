// Runs the device functions of csrc/ on the host, as the CUDA kernels call them, for a sanitizer to watch.
//
//   host_teams LANES < cases > masks
//
// With one lane the team is that of the CPU; with more, a team of threads stands in for a warp. A case is a line of
// integers: seed, step, first image, images, and the plan's numbers. Each case gives four lines: context, its
// cu_seqlens, targets, their cu_seqlens.
//
// Only sync() orders the memory accesses of different lanes, as far as ThreadSanitizer can tell: like a warp's shuffles
// and ballots, the other operations exchange values and order nothing. So a missing sync() is reported as a data race.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "packing.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#else
static void AnnotateIgnoreSyncBegin(const char*, int) {}
static void AnnotateIgnoreSyncEnd(const char*, int) {}
#endif

namespace {

using namespace ijepa;

constexpr int kMostLanes = 32;
constexpr int kSegments = 32;  // as in block_masks_cuda.cu
constexpr int32_t kUnwritten = 0x7EADBEEF;

struct Meeting {
  explicit Meeting(int lanes) { pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(lanes)); }
  ~Meeting() { pthread_barrier_destroy(&barrier); }
  pthread_barrier_t barrier;
  std::atomic<int> values[kMostLanes];
};

class ThreadTeam {
 public:
  ThreadTeam(Meeting& meeting, int lane, int size) : meeting_(meeting), lane_(lane), size_(size) {}
  int lane() const { return lane_; }
  int size() const { return size_; }
  void sync() { pthread_barrier_wait(&meeting_.barrier); }

  int sum(int x) {
    return combine(x, 0, size_, [](int a, int b) { return a + b; });
  }
  int sum_before(int x) {
    return combine(x, 0, lane_, [](int a, int b) { return a + b; });
  }
  int least(int x) {
    return combine(x, INT32_MAX, size_, [](int a, int b) { return std::min(a, b); });
  }

  template <class Predicate>
  uint32_t ballot(int count, Predicate predicate) {
    uint32_t own = 0;
    for (int bit = lane_; bit < count; bit += size_) own |= static_cast<uint32_t>(predicate(bit)) << bit;
    return static_cast<uint32_t>(combine(static_cast<int>(own), 0, size_, [](int a, int b) { return a | b; }));
  }

  template <class Visit>
  void for_each_bit(uint32_t word, Visit visit) const {
    for (int bit = lane_; bit < 32; bit += size_) {
      if (word >> bit & 1) visit(bit, count_bits(word & ((1u << bit) - 1)));
    }
  }

 private:
  template <class Combine>
  int combine(int x, int result, int lanes, Combine with) {
    meeting_.values[lane_].store(x, std::memory_order_relaxed);
    meet();
    for (int lane = 0; lane < lanes; ++lane) result = with(result, meeting_.values[lane].load(std::memory_order_relaxed));
    meet();
    return result;
  }

  void meet() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    pthread_barrier_wait(&meeting_.barrier);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }

  Meeting& meeting_;
  int lane_, size_;
};

// One case, with every buffer exactly as large as it needs to be.
struct Case {
  int64_t seed, step, first_image, num_images, num_masks;
  Plan plan;
  std::vector<Block> memory;
  std::vector<uint32_t> scratch;
  std::vector<int32_t> context, context_cu_seqlens, targets, target_cu_seqlens, sums;
  Workspace workspace;

  explicit Case(const std::string& line) : sums(kSegments, kUnwritten) {
    std::istringstream numbers(line);
    numbers >> seed >> step >> first_image >> num_images;
    std::vector<int64_t> plan_numbers;
    for (int64_t number; numbers >> number;) plan_numbers.push_back(number);
    plan = read_plan(plan_numbers.data(), plan_numbers.size());
    check_images(plan, first_image, num_images);
    num_masks = num_images * plan.per_image;
    memory.resize(static_cast<size_t>(workspace.lay_out(plan, num_masks, 0)) / sizeof(Block),
                  {kUnwritten, kUnwritten, kUnwritten, kUnwritten});
    workspace.lay_out(plan, num_masks, reinterpret_cast<uintptr_t>(memory.data()));
    scratch.resize(static_cast<size_t>(num_masks * plan.scratch_words), kUnwritten);
    context_cu_seqlens.resize(static_cast<size_t>(num_masks * plan.num_contexts + 1), kUnwritten);
    target_cu_seqlens.resize(static_cast<size_t>(num_masks * plan.num_targets + 1), kUnwritten);
  }

  // What block_masks_cuda.cu launches, kernel after kernel; a launch is the sync between them.
  template <class Team>
  void run(Team& team) {
    const RandomSource source = random_source(seed, step);
    for (int64_t b = 0; b < num_masks; ++b) {
      draw_mask(team, plan, source, step_sizes(plan, source), workspace, b, static_cast<uint32_t>(first_image),
                scratch.data() + b * plan.scratch_words);
    }
    team.sync();
    if (plan.context == ContextMode::batch_min) {
      for (int64_t g = 0; g < num_masks / plan.group_size; ++g) truncate_group(team, plan, workspace, g);
      team.sync();
    }
    for (int32_t* starts : {workspace.context_starts, workspace.target_starts}) {
      for (int segment = 0; segment < kSegments; ++segment) {
        const int sum = segment_sum(team, starts, segment_of(num_masks, segment, kSegments));
        if (team.lane() == 0) sums[static_cast<size_t>(segment)] = sum;
      }
      team.sync();
      for (int segment = 0; segment < kSegments; ++segment) {
        const int start = sum_of_segments_before(team, sums.data(), segment);
        const int end = segment_starts(team, starts, segment_of(num_masks, segment, kSegments), start);
        if (segment == kSegments - 1 && team.lane() == 0) starts[num_masks] = end;
      }
      team.sync();
    }
    if (team.lane() == 0) {
      context.resize(static_cast<size_t>(workspace.context_starts[num_masks]), kUnwritten);
      targets.resize(static_cast<size_t>(workspace.target_starts[num_masks]), kUnwritten);
    }
    team.sync();
    const Packed packed{context.data(), context_cu_seqlens.data(), targets.data(), target_cu_seqlens.data()};
    for (int64_t b = 0; b < num_masks; ++b) pack_mask(team, plan, workspace, b, packed);
    if (team.lane() == 0) {
      context_cu_seqlens.back() = workspace.context_starts[num_masks];
      target_cu_seqlens.back() = workspace.target_starts[num_masks];
    }
    team.sync();
  }
};

void print(const std::vector<int32_t>& numbers) {
  for (size_t i = 0; i < numbers.size(); ++i) std::cout << (i ? " " : "") << numbers[i];
  std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  const int lanes = argc == 2 ? std::stoi(argv[1]) : 0;
  if (lanes < 1 || lanes > kMostLanes) {
    std::cerr << "host_teams LANES < cases > masks, LANES from 1 to " << kMostLanes << '\n';
    return 2;
  }
  std::vector<Case> cases;
  for (std::string line; std::getline(std::cin, line);) cases.emplace_back(line);
  if (lanes == 1) {
    SingleLane team;
    for (Case& one : cases) one.run(team);
  } else {
    Meeting meeting(lanes);
    std::vector<std::thread> threads;
    for (int lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, lane] {
        ThreadTeam team(meeting, lane, lanes);
        for (Case& one : cases) one.run(team);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  for (const Case& one : cases) {
    print(one.context);
    print(one.context_cu_seqlens);
    print(one.targets);
    print(one.target_cu_seqlens);
  }
  return 0;
}
