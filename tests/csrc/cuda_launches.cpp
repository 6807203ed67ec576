// Runs launch_on_cuda of csrc/block_masks_cuda.cu, compiled against stand_in/cuda_runtime.h.
//
//   cuda_launches ROOM < cases > masks
//
// Cases and masks as in host_teams.cpp, with buffers of ROOM rows more than there are tokens. After the four lines of a
// case comes one of its launches: kernel, blocks, threads, bytes of shared memory and stream of each.
#define main host_teams_main
#include "host_teams.cpp"
#undef main

#include "backends.h"
#include "stand_in/cuda_runtime.h"

int main(int argc, char** argv) {
  const int64_t room = argc == 2 ? std::stoll(argv[1]) : 0;
  for (std::string line; std::getline(std::cin, line);) {
    Case one(line), counted(line);
    SingleLane team;
    counted.run(team);
    const Rows rows{static_cast<int64_t>(counted.context.size()) + room,
                    static_cast<int64_t>(counted.targets.size()) + room};
    one.context.resize(static_cast<size_t>(rows.context), kUnwritten);
    one.targets.resize(static_cast<size_t>(rows.targets), kUnwritten);
    const Packed packed{one.context.data(), one.context_cu_seqlens.data(), one.targets.data(),
                        one.target_cu_seqlens.data()};
    stand_in::launches.clear();
    launch_on_cuda({one.plan, one.first_image, one.num_masks}, &one.seed, &one.step, one.workspace, one.scratch.data(),
                   packed, rows, reinterpret_cast<void*>(0x57));
    print(one.context);
    print(one.context_cu_seqlens);
    print(one.targets);
    print(one.target_cu_seqlens);
    for (const stand_in::Launch& each : stand_in::launches) {
      std::cout << each.kernel << ' ' << each.blocks << ' ' << each.threads << ' ' << each.shared << ' ' << each.stream
                << "; ";
    }
    std::cout << '\n';
  }
  return 0;
}
