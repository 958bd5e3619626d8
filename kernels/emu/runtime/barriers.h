// Barriers of a block, a warp and a cluster.
#pragma once

namespace emu {

// What a place in the source does to order threads or asynchronous operations. A test can make one place do nothing.
enum class SiteKind : int { SyncThreads, SyncWarp, NamedBarrier, CopyWait, MbarrierWait, WgmmaWait, ClusterSync };

// Notes that a thread has come to this place; true when the place is to do nothing.
bool at_site(SiteKind kind, const char *file, int line);

// bar.sync (`wait`) or bar.arrive. `count` threads take part; 0: all of the block, at the same place in the source.
void block_barrier(int id, unsigned count, bool wait, const char *file, int line);
// All threads of all blocks that run together.
void grid_barrier(const char *file, int line);
void sync_warp(uint32_t mask, const char *file, int line);

}  // namespace emu

inline void __syncthreads(EMU_PLACE) { emu::block_barrier(0, 0, true, file, line); }
inline void __syncwarp(uint32_t mask = ~0u, EMU_PLACE) { emu::sync_warp(mask, file, line); }

// Fences order this thread's accesses for whoever learns of them through an atomic. The race checks do not follow values, so
// a fence counts as meeting every earlier fence of the device.
void __threadfence();
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) { emu::maybe_yield(); }
