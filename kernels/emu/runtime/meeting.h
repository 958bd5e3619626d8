// How the lanes of a warp meet.
#pragma once
#include "scheduler.h"

namespace emu {

// The group of lanes with this mask, made if need be.
inline Group *find_group(Warp &warp, uint32_t mask) {
    for (unsigned i = 0; i < warp.num_groups; i++)
        if (warp.groups[i].mask == mask) return &warp.groups[i];
    Group *group = nullptr;
    if (warp.num_groups < MAX_GROUPS) {
        group = &warp.groups[warp.num_groups++];
    } else {
        for (Group &idle : warp.groups)
            if (!idle.arrived) group = &idle;
        if (!group) fail("lanes of one warp wait with more than %u different masks", MAX_GROUPS);
    }
    group->mask = mask;
    group->arrived = group->epoch = 0;
    return group;
}

// Deposits a lane's bytes and waits for all lanes of the mask. Whoever comes last runs `last(group, buffer)` on what all have
// brought, before anybody goes on.
template <class Last>
inline void meet(uint32_t mask, int op, const void *value, unsigned bytes, const char *file, int line, Last last) {
    Thread *t = me();
    Warp &warp = t->block->warps[t->warp];
    const uint32_t lane = 1u << t->lane, need = mask & warp.exist;
    worker->stats.collectives++;
    if (!(mask & lane)) fail("%s:%d: calling lane %u is not in its own mask %08x", file, line, t->lane, mask);
    if (need & warp.done)
        fail("%s:%d: lanes %08x of mask %08x have already returned", file, line, need & warp.done, mask);
    Group *group = find_group(warp, need);
    if (!group->arrived) {
        group->op = op;
        group->file = file;
        group->line = line;
    } else if (group->op != op || group->line != line) {
        fail("divergent warp collective: this lane is at %s:%d, lanes %08x are at %s:%d", file, line, group->arrived,
             group->file, group->line);
    }
    const unsigned buffer = group->epoch & 1;
    copy_quietly(group->slot[buffer][t->lane], value, bytes);
    group->arrived |= lane;
    t->met = group;
    t->met_buffer = buffer;
    // Only __syncwarp orders memory; a shuffle does not.
    if (op == SYNCWARP) sync_release(&group->order[buffer]);
    if (group->arrived == need) {
        if (need == warp.exist) flush_accesses(worker, warp);
        last(*group, buffer);
        group->present[buffer] = need;
        group->arrived = 0;
        group->epoch++;
        set_runnable(t->block, t->warp, need);
        if (worker->launch->config.order >= 2) reschedule();
    } else {
        block_on(Wait::Warp, 0, need, file, line);
    }
    if (op == SYNCWARP) sync_acquire(&group->order[buffer]);
}

}  // namespace emu
